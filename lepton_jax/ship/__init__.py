"""From a trained run to a service: artifacts, exports, servers, and an eye on them."""
