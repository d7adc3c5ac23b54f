"""The drivers that kvpersist brings: one module each, loaded when its scheme is asked for."""
