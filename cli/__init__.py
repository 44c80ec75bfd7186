"""The commands photon-data and photon."""
