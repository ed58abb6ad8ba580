// Package testenv is what the tests of runtime and of the packages below it share.
package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Require skips the test if the machine lacks something: "root", or a program. If TEST_REQUIRE, a list with commas, names it,
// the test fails instead.
func Require(t *testing.T, what string) {
	t.Helper()
	ok := false
	if what == "root" {
		ok = os.Geteuid() == 0
	} else {
		_, err := exec.LookPath(what)
		ok = err == nil
	}
	switch {
	case ok:
	case slices.Contains(strings.FieldsFunc(os.Getenv("TEST_REQUIRE"), func(r rune) bool { return r == ',' || r == ' ' }), what):
		t.Fatalf("no %s, which TEST_REQUIRE demands", what)
	default:
		t.Skipf("no %s", what)
	}
}

// Write writes a file, and makes the directories above it.
func Write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}
