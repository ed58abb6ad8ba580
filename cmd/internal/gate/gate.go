// Package gate runs the command of --verify, which decides whether an image may get its name.
package gate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"

	"distkit/content"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/pflag"
)

// patience is how long the command may take to end after a signal.
const patience = 5 * time.Second

// Flag registers --verify.
func Flag(f *pflag.FlagSet) *string {
	c := new(command)
	f.Var(c, "verify", "give no name unless `COMMAND`, run by sh with NAME and DIGEST as arguments, exits with 0")
	return (*string)(c)
}

// command is shell text to which arguments are appended.
type command string

func (c *command) String() string { return string(*c) }
func (c *command) Type() string   { return "string" }

// Patterns of shell text.
var (
	quoted      = regexp.MustCompile(`'[^']*'|"(\\.|[^"\\])*"|\\.`)
	descriptors = regexp.MustCompile(`[0-9]*[<>]&[0-9-]*`)
	comment     = regexp.MustCompile(`(^|[\s;&|()])#[^\n]*$`)
	// prefixes matches what may precede a command's name.
	prefixes = regexp.MustCompile(`^(\s|!\s|[A-Za-z_][A-Za-z0-9_]*=\S*|[0-9]*[<>]+\|?\s*\S*)*!?$`)
)

// Set implements [pflag.Value]. It refuses text after which the shell would execute the first appended argument, which
// strangers choose, or treat the arguments as a comment.
func (c *command) Set(s string) error {
	s = strings.TrimSpace(s)
	plain := quoted.ReplaceAllString(s, "x")
	last := descriptors.ReplaceAllString(plain, " ")
	last = last[strings.LastIndexAny(last, ";&|\n")+1:]
	if prefixes.MatchString(last) || strings.HasSuffix(plain, `\`) {
		return errors.New("nothing at its end takes the name and the digest as arguments")
	}
	if comment.MatchString(plain) {
		return errors.New("it ends with a comment, and so the name and the digest would be no arguments")
	}
	*c = command(s)
	return nil
}

// Gate is a command, and what its environment tells it about an image.
type Gate struct {
	Command   string
	Store     *content.Store // has the image, or its documents; held by the caller
	Hold      string         // the value of content.HoldEnv for it
	Namespace string
	Source    string // the locator that the image comes from, or ""
}

// Check runs the command for an image, and succeeds only if it exits with 0. Otherwise the error is DataLoss. The
// command's standard input is empty, and its standard output is our standard error. The image's name is an argument,
// never part of the shell text. If the command could take the name for a flag, the error is DataLoss too.
func (g Gate) Check(ctx context.Context, name string, dgst digest.Digest) error {
	if strings.HasPrefix(name, "-") {
		return errclass.Errorf(errdefs.ErrDataLoss, "%s is not named %.80q: a name that is to be verified may not begin with -", dgst, name)
	}
	c := exec.CommandContext(ctx, "sh", "-c", g.Command+` "$@"`, "verify", name, string(dgst))
	c.Stdout, c.Stderr = os.Stderr, os.Stderr
	c.Env = append(c.Environ(), "DIST_ROOT="+g.Store.Root(), "CONTAINERD_NAMESPACE="+g.Namespace, "DIST_SOURCE="+g.Source)
	if g.Hold != "" {
		c.Env = append(c.Env, g.Hold)
	}
	c.Cancel, c.WaitDelay = func() error { return c.Process.Signal(syscall.SIGTERM) }, patience
	err := c.Run()
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("verify: %w", err)
	}
	return errclass.Errorf(errdefs.ErrDataLoss, "%s is not named: the command that verifies it ended with %s", cmp.Or(name, string(dgst)), exit)
}
