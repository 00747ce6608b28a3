"""Where files live (local disks, object stores) and how a directory of them is committed."""
