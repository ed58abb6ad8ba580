# distkit: container images as Unix plumbing.
# The two commands to know: `make demo` and `make test`.

PREFIX  ?= /usr/local
DESTDIR ?=
TESTFLAGS ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
DATE    ?= $(shell git log -1 --format=%cs 2>/dev/null)

COMMANDS  := $(notdir $(patsubst %/main.go,%,$(wildcard cmd/*/main.go)))
WORKFLOWS := $(notdir $(filter-out %.md,$(wildcard scripts/dist-* scripts/snap-*)))
PAGES     := $(patsubst %.md,man/%,$(notdir $(wildcard cmd/*/*.[17].md scripts/*.1.md image/*.7.md layer/*/*.5.md remotes/*.7.md snapshot/*.7.md))) man/distkit-layout.5
MODULES   := . $(dir $(wildcard testdata/go.mod testdata/*/go.mod))

export VERSION

.PHONY: all goversion build test e2e faults hostile demo bench bench-apply fuzz lint man completions install uninstall dist clean

all: build man completions

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
page = $(or $(wildcard cmd/*/$(1).md scripts/$(1).md image/$(1).md layer/*/$(1).md remotes/$(1).md snapshot/$(1).md),content/$(1:distkit-%=%).md)
.SECONDEXPANSION:
man/%: $$(call page,$$*)
	@mkdir -p man
	@sed '1s|""|"$(DATE)"|; 1s|distkit$$|"distkit $(VERSION)"|' $< >$@.md
	@go run github.com/cpuguy83/go-md2man/v2@v2.0.7 -in $@.md -out $@ && rm $@.md

completions:
	@go run ./cmd/internal/completions completions $(COMMANDS) $(filter-out dist-check-remote dist-remote-% snap-%,$(WORKFLOWS))

# What was built is installed as it is: root needs no Go.
install:
	@DESTDIR='$(DESTDIR)' scripts/install '$(PREFIX)'

uninstall:
	@DESTDIR='$(DESTDIR)' scripts/install --remove '$(PREFIX)'

# The pages bear the version.
dist:
	@rm -rf man
	@$(MAKE) --no-print-directory all
	@scripts/package dist tar.gz deb rpm apk

clean:
	rm -rf bin man completions dist
