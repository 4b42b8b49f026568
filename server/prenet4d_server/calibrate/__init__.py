"""Making a calibration of stored or live data, with a picture that shows whether to trust it."""
