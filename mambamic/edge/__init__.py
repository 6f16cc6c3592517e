"""The edge: nginx in front of servers, with limits, tokens, retries and a page."""
