"""Holds the version of quickthaw, the only copy in the code (setup.cfg has the packages' copy)."""

VERSION = "0.1.0"
