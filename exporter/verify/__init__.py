"""The command `verify`: poll, read the same again, compare the counts.

command     poll for a time, read again, compare, print
count       the plain count of what was read again, one class per collector
answers     checks the members of each answer; writes copies without names, addresses and ids of the site
members     which members of answers the exporter reads, and which others the vendor documents
"""
