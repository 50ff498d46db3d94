"""The page that proves in a browser: what it reads, what it answers, and how it is built."""
