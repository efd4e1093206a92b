# What a developer runs. The tests drive the real executor, which npm installs below tests/support.

EXECUTOR := tests/support/node_modules/.package-lock.json
CLIENTS := tests/support/mcp_clients

# Names the first of the programs $(1) that is missing, in one line.
need = @for program in $(1); do command -v "$$program" >/dev/null 2>&1 || \
	{ echo "missing: $$program; this target needs $(1)" >&2; exit 1; }; done

.PHONY: demo test test-mcp check bench tools-of-test

demo:
	$(call need,cargo cc)
	cargo run --release --bin exec-gateway -- demo

test: tools-of-test $(EXECUTOR)
	cargo test --workspace

# Clients of other makers at the MCP door. What of the conformance suite does not apply, and why: $(CLIENTS)/conformance.yml.
test-mcp: tools-of-test $(EXECUTOR) $(CLIENTS)/node_modules/.package-lock.json $(CLIENTS)/venv/installed
	cargo test --test main mcp_clients -- --ignored --nocapture --test-threads 1

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

bench:
	$(call need,cargo cc)
	cargo bench

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
