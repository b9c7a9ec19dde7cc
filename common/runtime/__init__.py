"""How and where training runs: devices, several networks, several GPUs."""
