"""Rollouts by vLLM servers: sampling over HTTP, publishing weights to the servers, one step off policy."""
