"""Rollouts by vLLM servers: sampling over HTTP, weights that reach the servers, one step off policy."""
