# What a developer runs. The tests drive the real executor, which npm installs below tests/support.

EXECUTOR := tests/support/node_modules/.package-lock.json
CLIENTS := tests/support/mcp_clients

# Names the first of the programs $(1) that is missing, in one line.
need = @for program in $(1); do command -v "$$program" >/dev/null 2>&1 || \
	{ echo "missing: $$program; this target needs $(1)" >&2; exit 1; }; done

# Where cargo builds, and what is made of it.
TARGET := $(or $(CARGO_TARGET_DIR),target)
GENERATED := $(TARGET)/release/generated

.PHONY: demo test test-mcp test-otlp check bench test-restart test-proxies package test-package tools-of-test

demo:
	$(call need,cargo cc)
	cargo run --release --bin exec-gateway -- demo

test: tools-of-test $(EXECUTOR)
	cargo test --workspace

# Clients of other makers at the MCP door. What of the conformance suite does not apply, and why: $(CLIENTS)/conformance.yml.
test-mcp: tools-of-test $(EXECUTOR) $(CLIENTS)/node_modules/.package-lock.json $(CLIENTS)/venv/installed
	cargo test --test main mcp_clients -- --ignored --nocapture --test-threads 1

# Spans, in a build that makes them.
test-otlp:
	$(call need,cargo cc)
	cargo test --features otlp --test main trace::

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings

bench:
	$(call need,cargo cc)
	cargo bench

# Hundreds of calls a second over four restarts, by socket activation; three minutes.
test-restart: tools-of-test $(EXECUTOR)
	$(call need,systemd-socket-activate)
	cargo test --release --test main restart_load -- --include-ignored --nocapture --test-threads 1

# An executor, calls, events and sockets through nginx and Caddy, configured as deploy/ has it.
test-proxies: tools-of-test $(EXECUTOR)
	$(call need,nginx caddy openssl)
	cargo test --test main proxies -- --ignored

# A Debian package, $(TARGET)/debian/exec-gateway_*.deb, for the release of Debian that this runs on and later ones.
package:
	$(call need,cargo cc cargo-deb dpkg-shlibdeps gzip)
	cargo build --release --locked --bin exec-gateway
	rm -rf $(GENERATED)
	$(TARGET)/release/exec-gateway generate man $(GENERATED)/man
	gzip -9n $(GENERATED)/man/*
	$(TARGET)/release/exec-gateway generate completions $(GENERATED)
	cargo deb --no-build --locked --quiet --output $(TARGET)/debian/

# Installs, upgrades and removes it in a Debian of its own, as root.
test-package: package $(EXECUTOR)
	$(call need,debootstrap dpkg-deb nsenter curl)
	deploy/test-package $(TARGET)

tools-of-test:
	$(call need,cargo cc make npm)

$(EXECUTOR): tests/support/package-lock.json tests/support/package.json | tools-of-test
	cd tests/support && npm ci
	@touch $@

$(CLIENTS)/node_modules/.package-lock.json: $(CLIENTS)/package-lock.json $(CLIENTS)/package.json | tools-of-test
	cd $(CLIENTS) && npm ci
	@touch $@

$(CLIENTS)/venv/installed: $(CLIENTS)/requirements.txt
	$(call need,python3)
	python3 -m venv $(CLIENTS)/venv
	$(CLIENTS)/venv/bin/pip install -q -r $<
	@touch $@
