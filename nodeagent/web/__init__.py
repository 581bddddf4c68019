"""The agent over HTTP: `app` has the pages, `listener` the connections, `process` what the daemon itself uses."""
