package cmd_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "distkit/"

// leaves lists the packages that any package may import. They import none of ours, except each other.
var leaves = []string{"errclass", "disk", "compression", "batch", "layer", "refname", "erofs"}

// eventLog is a leaf that only packages which change a store may import.
const eventLog = "events"

func logs(area string) bool {
	return area == "content" || area == "image" || area == "snapshot" || area == "runtime" || area == "remotes"
}

// domain lists the packages that never import each other.
var domain = []string{"content", "remotes", "archive", "snapshot", "runtime"}

// mayImport lists the packages of ours, including those below them, that each command may link besides
// cmd/internal/cli. Only commands that import remotes, and dist-serve, may link net/http.
var mayImport = map[string][]string{
	"dist-abort":      {"content"},
	"dist-active":     {"content"},
	"dist-apply":      {"archive"},
	"dist-cat":        {"image", "content"},
	"dist-chain":      {"archive"},
	"dist-copy-graph": {"image", "content", "remotes"},
	"dist-delete":     {"content"},
	"dist-doctor":     {"content", "remotes", "runtime"},
	"dist-disk":       {"erofs", "image", "content"},
	"dist-edit":       {"image", "content"},
	"dist-diff":       {"archive"},
	"dist-erofs":      {},
	"dist-events":     {"content"},
	"dist-export":     {"image", "content"},
	"dist-fetch":      {"remotes"},
	"dist-gc":         {"image", "content", "snapshot"},
	"dist-hold":       {"content"},
	"dist-hosts":      {"remotes"},
	"dist-image":      {"image", "content", "snapshot"},
	"dist-import":     {"image", "content"},
	"dist-index":      {"image", "content"},
	"dist-ingest":     {"content"},
	"dist-label":      {"content"},
	"dist-list":       {"content"},
	"dist-login":      {"remotes"},
	"dist-logout":     {"remotes"},
	"dist-du":         {"image", "content"},
	"dist-file":       {"image", "content", "remotes"},
	"dist-ls":         {"image", "content", "remotes"},
	"dist-namespace":  {"image", "content"},
	"dist-path":       {"content"},
	"dist-put":        {"remotes"},
	"dist-referrers":  {"remotes"},
	"dist-resolve":    {"remotes"},
	"dist-serve":      {"image", "content"},
	"dist-tags":       {"remotes"},
	"dist-token":      {"remotes"},
	"dist-untag":      {"remotes"},
	"dist-userns":     {},
	"dist-verify":     {"image", "content"},
	"distkit":         {},
	"run":             {"runtime", "snapshot"},
	"run-cdi":         {"runtime/spec"},
	"run-net":         {"runtime"},
	"run-spec":        {"runtime/spec"},
	"snap":            {"snapshot"},
	"task":            {"runtime", "snapshot", "content", "archive", "image"},
}

// usesNetwork reports whether a command speaks HTTP.
func usesNetwork(command string) bool {
	return command == "dist-serve" || slices.Contains(mayImport[command], "remotes")
}

func deps(t *testing.T, pkg string) []string {
	t.Helper()
	out, err := exec.Command("go", "list", "-deps", pkg).Output()
	if err != nil {
		t.Fatalf("go list -deps %s: %v", pkg, err)
	}
	return strings.Fields(string(out))
}

// area returns the top folder of a package of ours, or "" for any other package.
func area(pkg string) string {
	rest, ok := strings.CutPrefix(pkg, module)
	if !ok {
		return ""
	}
	top, _, _ := strings.Cut(rest, "/")
	return top
}

// within reports whether a package is one of the listed ones, or below one.
func within(pkg string, of []string) bool {
	return slices.ContainsFunc(of, func(top string) bool { return strings.HasPrefix(pkg+"/", module+top+"/") })
}

func TestDomainPackagesAreIndependent(t *testing.T) {
	for _, d := range slices.Concat([]string{"image", eventLog}, leaves, domain) {
		out, err := exec.Command("go", "list", module+d+"/...").Output()
		if err != nil {
			t.Fatalf("go list %s: %v", d, err)
		}
		for _, pkg := range strings.Fields(string(out)) {
			for _, dep := range deps(t, pkg) {
				if area(dep) == eventLog && logs(d) {
					continue
				}
				if a := area(dep); a != "" && !slices.Contains(leaves, a) && a != d && (d != "image" || a != "content") {
					t.Errorf("%s links %s", pkg, dep)
				}
			}
		}
	}
}

func TestCommandsLinkOnlyWhatTheyMay(t *testing.T) {
	for _, c := range commands {
		may, listed := mayImport[c]
		if !listed {
			t.Errorf("%s is not in this test's table", c)
			continue
		}
		for _, dep := range deps(t, "./"+c) {
			if area(dep) == eventLog && slices.ContainsFunc(may, logs) {
				continue
			}
			if a := area(dep); a != "" && a != "cmd" && !slices.Contains(leaves, a) && !within(dep, may) {
				t.Errorf("%s links %s", c, dep)
			}
			if dep == "net/http" && !usesNetwork(c) {
				t.Errorf("%s links net/http", c)
			}
			if dep == "github.com/containerd/go-runc" && !slices.Contains(may, "runtime") {
				t.Errorf("%s links %s", c, dep)
			}
			if dep == "testing" {
				t.Errorf("%s links package testing", c)
			}
		}
	}
	for c := range mayImport {
		if !slices.Contains(commands, c) {
			t.Errorf("this test's table names %s, which is no command", c)
		}
	}
}
