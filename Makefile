# distkit: container images as Unix plumbing.
# The two commands to know: `make demo` and `make test`.

PREFIX  ?= /usr/local
DESTDIR ?=
TESTFLAGS ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)

COMMANDS  := $(notdir $(patsubst %/main.go,%,$(wildcard cmd/*/main.go)))
WORKFLOWS := $(notdir $(filter-out %.md,$(wildcard scripts/dist-* scripts/snap-*)))
PAGES     := $(patsubst %.md,man/%,$(notdir $(wildcard cmd/*/*.1.md scripts/*.1.md content/*.5.md image/*.7.md layer/*/*.5.md remotes/*.7.md snapshot/*.7.md)))
MODULES   := . $(dir $(wildcard testdata/go.mod testdata/*/go.mod))

export VERSION

.PHONY: goversion build test e2e faults hostile demo bench bench-apply fuzz lint man completions install clean

goversion:
	@scripts/needs go

build: goversion
	@mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -ldflags "$$(scripts/ldflags $(VERSION))" -o bin/ $(addprefix ./cmd/,$(COMMANDS))
	@scripts/install-workflows bin $(VERSION)

# What the machine lacks is skipped, and counted in the last line.
test: goversion
	@scripts/needs test || true
	@go build -C testdata -o ../bin/.summary ./summary
	@TESTFLAGS='$(TESTFLAGS)' bin/.summary $(MODULES)

e2e: build
	@scripts/needs e2e
	@go build -C testdata -o ../bin/.summary ./summary
	@TESTFLAGS='-tags e2e -count=1 -v -timeout 30m' bin/.summary testdata/e2e
	cd testdata/layers && go test -count=1 -v -run OfDebian . -sets tiny

# Every system call of every command that writes fails once with each error: hours. make test has a short form.
faults:
	cd testdata && go test ./faults -count=1 -v -timeout 24h -long

# Every command on every store of a stranger's that concerns it, for hours; make test runs a sample.
hostile: build
	cd testdata && TEST_BIN=$(CURDIR)/bin HOSTILE=all go test -count=1 -v -timeout 24h ./hostile

demo: goversion
	@scripts/needs demo
	@echo 'Building; the first time fetches modules and takes some minutes.'
	@$(MAKE) --no-print-directory -s build
	@scripts/demo

bench: build
	@scripts/bench

bench-apply: build
	@scripts/bench-apply $(LAYERS)

fuzz:
	@scripts/fuzz

lint:
	@scripts/lint

man: $(PAGES)
man/%: ; @mkdir -p man; go run github.com/cpuguy83/go-md2man/v2@v2.0.7 -in $(wildcard cmd/*/$*.md scripts/$*.md content/$*.md image/$*.md remotes/$*.md snapshot/$*.md) -out $@

completions:
	@go run ./cmd/internal/completions completions $(COMMANDS) $(filter-out dist-check-remote dist-remote-% snap-%,$(WORKFLOWS))

install: build man completions
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,bin share/man/man1 share/man/man5 share/man/man7 share/bash-completion/completions share/zsh/site-functions share/fish/vendor_completions.d)
	install -m 755 $(addprefix bin/,$(COMMANDS) $(WORKFLOWS)) $(DESTDIR)$(PREFIX)/bin
	install -m 644 bin/workflow.sh $(DESTDIR)$(PREFIX)/bin
	install -m 644 man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 man/*.5 $(DESTDIR)$(PREFIX)/share/man/man5
	install -m 644 man/*.7 $(DESTDIR)$(PREFIX)/share/man/man7
	install -m 644 completions/bash/* $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	install -m 644 completions/zsh/* $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	install -m 644 completions/fish/* $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	@for c in snap run task; do for d in $$(echo "$$PATH" | tr : ' '); do \
	  if [ -x "$$d/$$c" ] && [ "$$d" != "$(PREFIX)/bin" ]; then echo "warning: $$d/$$c is another program of the same name as $(PREFIX)/bin/$$c" >&2; fi; done; done

clean:
	rm -rf bin man completions
