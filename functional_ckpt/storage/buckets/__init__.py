"""Object stores behind one interface, each backed by the client library of its provider."""
