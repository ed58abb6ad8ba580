package sibling

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os/exec"
	"strings"

	"distkit/errclass"
)

// Run runs a command, and returns its standard output and standard error. in is its standard input, or nil for none. If
// it fails, err has its message, and the class of its status.
func Run(ctx context.Context, in io.Reader, name string, args ...string) (out, errs []byte, err error) {
	c := exec.CommandContext(ctx, Path(name), args...)
	var stdout, stderr bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = in, &stdout, &stderr
	err = c.Run()
	if text := strings.TrimPrefix(strings.TrimSpace(stderr.String()), name+": "); err != nil && text != "" {
		if status := c.ProcessState.ExitCode(); status > 0 {
			err = errclass.Remote(status, text)
		} else {
			err = errors.New(text)
		}
	}
	return stdout.Bytes(), stderr.Bytes(), err
}
