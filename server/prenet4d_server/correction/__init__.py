"""From the ring through the corrector to the publisher: the main work of the main process."""
