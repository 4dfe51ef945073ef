"""Where counts are kept: one payload per (collector, scope), replaced as a whole by one transaction per poll."""
