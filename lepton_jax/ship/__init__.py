"""From a trained run to a service, a device and a smaller model."""
