"""The shells around the model that live in a mailbox; they may touch the bus and the ports, and no adapter."""
