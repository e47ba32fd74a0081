"""Meshes, logical axes and many hosts. Modules declare logical axes already; nothing is sharded yet."""
