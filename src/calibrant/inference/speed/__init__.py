"""How fast training, draws and references of a model are on this machine."""
