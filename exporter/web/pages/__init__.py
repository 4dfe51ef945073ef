"""Pages for people, in English and Chinese: plain HTML and CSS, without scripts and without anything loaded.

texts      every text in both languages
html       what all pages share: frame, language, small pieces of HTML
landing    GET /
failures   GET /failures
"""
