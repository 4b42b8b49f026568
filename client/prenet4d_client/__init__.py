"""prenet4d client: send frames, subscribe to corrected patterns, control the service."""
