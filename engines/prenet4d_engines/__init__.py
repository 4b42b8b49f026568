"""prenet4d engines: the science, from simulation to the three-stage corrector."""
