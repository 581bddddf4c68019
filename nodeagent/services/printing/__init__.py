"""Printing behind the seat: runs in the daemon, which never reads a document.

spool       jobs of all seats, durable; spool_jobs and spool_store beside it
carriage    an accepted job on its way: convert, submit, follow
convert     which programs turn a document into what a printer speaks; filters runs them
cups        the private cupsd; its files, its client and the look at its jobs beside it
printers    an offered printer, as each side needs to know it
"""
