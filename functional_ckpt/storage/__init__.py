"""Storage of files on local disks and object stores, and the commit of directories."""
