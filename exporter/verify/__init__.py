"""The command `verify`: does what was counted agree with what the platform shows when it is read again?

command     the story: poll for a time, read again, compare, print
count       the plain count of what was read again, one class per collector
answers     every answer that arrives: its members, and a copy without anything of the site
members     which members of the answers somebody reads, and which the vendor documents
"""
