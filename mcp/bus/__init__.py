"""How messages travel: codec, subjects, grants, keys and both transports; the only package that may touch NATS and msgpack."""
