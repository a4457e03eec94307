"""A fleet of real parts on one Linux machine: systemd, engines, ssh, registry, DNS, ACME (docs/lab.md)."""
