"""Printing as the desktop sees it (RFC 8010, 8011 over HTTP/1.1): runs in the seat's worker, parses what the desktop says.

service     one connection after the other, and what is told about the seat
http        HTTP/1.1 on a socket, bodies without copies
requests    an IPP request, checked
operations  what may be asked, a method each
incoming    a document on its way into the spool
answers     attributes of printers and jobs; media and formats beside it
"""
