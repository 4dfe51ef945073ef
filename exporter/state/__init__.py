"""Where counts survive: one payload per (collector, scope), replaced whole in one transaction per poll."""
