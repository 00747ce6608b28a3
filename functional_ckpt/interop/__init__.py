"""Other libraries' formats and objects; each module is the only importer of its peer."""
