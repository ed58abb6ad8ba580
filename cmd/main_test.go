// Package cmd_test checks what all commands promise together: streams, statuses and signals (contract), what each may
// link (layering), its page (manpages), its size (budget).
package cmd_test

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

var (
	bin       string   // directory of the built commands and the workflows
	commands  []string // Go programs
	workflows []string // scripts
)

func TestMain(m *testing.M) {
	os.Exit(build(m))
}

func build(m *testing.M) int {
	if signal.Ignored(syscall.SIGINT) {
		// Started with a shell's &, it would ignore the signal. A caught signal is reset for children.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGINT)
	}
	for _, v := range []string{"DIST_ROOT", "CONTAINERD_NAMESPACE", "CONTAINERD_SNAPSHOTTER", "DIST_HOSTS_DIR"} {
		os.Unsetenv(v)
	}
	dir, err := os.MkdirTemp("", "distkit-cmd-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	mains, _ := filepath.Glob("*/main.go")
	flags, err := exec.Command("../scripts/ldflags").Output()
	if err != nil {
		fmt.Fprintln(os.Stderr, "ldflags:", err)
		return 1
	}
	args := []string{"build", "-trimpath", "-ldflags", strings.TrimSpace(string(flags)), "-o", bin + "/"}
	for _, f := range mains {
		commands = append(commands, filepath.Dir(f))
		args = append(args, "./"+filepath.Dir(f))
	}
	goBuild := exec.Command("go", args...)
	goBuild.Env = append(os.Environ(), "CGO_ENABLED=0")
	install := exec.Command("../scripts/install-workflows", bin, "test")
	for _, c := range []*exec.Cmd{goBuild, install} {
		if out, err := c.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v: %v\n%s", c.Args, err, out)
			return 1
		}
	}
	scripts, _ := filepath.Glob("../scripts/dist-*")
	drivers, _ := filepath.Glob("../scripts/snap-*")
	for _, s := range append(scripts, drivers...) {
		if !strings.HasSuffix(s, ".md") {
			workflows = append(workflows, filepath.Base(s))
		}
	}
	return m.Run()
}

// all returns the commands and workflows that a user can call.
func all() []string { return append(append([]string(nil), commands...), workflows...) }
