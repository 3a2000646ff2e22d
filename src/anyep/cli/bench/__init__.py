"""The benchmark: a plan, ranks that carry it out and check every byte, spans that become tables."""
