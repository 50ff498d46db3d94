"""The search for a derivation, why there is none, and the nearest change that has one."""
