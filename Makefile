# Everything a contributor runs; `make` alone lists it. The work itself is in cargo and in scripts/.

# Only where cargo is told to put things elsewhere does this differ.
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help demo test test-rust test-sdk lint release bench

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-10s %s\n", $$1, $$2 }'

demo: ## start execd, try one session with an overlay, stop
	cargo build --locked --bin execd
	EXECD_BIN=$(TARGET_DIR)/debug/execd scripts/demo

test: test-rust test-sdk ## all tests

# nextest leaves the documentation's examples out.
test-rust: ## the Rust tests of the whole workspace
	@if cargo nextest --version >/dev/null 2>&1; then \
		set -ex; \
		cargo nextest run --workspace --locked --no-fail-fast; \
		cargo test --workspace --locked --doc; \
	else \
		set -ex; \
		cargo test --workspace --locked --no-fail-fast; \
	fi

test-sdk: ## the published Python SDK against the real binary
	cargo build --locked --bin execd
	EXECD_BIN=$(TARGET_DIR)/debug/execd scripts/sdk-tests

lint: ## formatting and clippy
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

release: ## the release binary, static where possible
	@scripts/release

bench: ## measure the release binary and print medians
	env $$(scripts/bench-setup) scripts/release bench --bench isolation --bench runs --bench files --bench workspaces
