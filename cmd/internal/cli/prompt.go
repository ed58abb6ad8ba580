package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/console"
)

// maxLine bounds a typed line.
const maxLine = 64 << 10

// Prompt asks for a line on the terminal that is standard input. It prints the question to standard error. If echo is
// false, what is typed is not shown.
func Prompt(ctx context.Context, question string, echo bool) (string, error) {
	in, err := Stdin(ctx)
	if err != nil {
		return "", err
	}
	defer in.Close()
	if !echo {
		terminal, err := console.ConsoleFromFile(os.Stdin)
		if err != nil {
			return "", fmt.Errorf("open the terminal: %w", err)
		}
		if err := terminal.DisableEcho(); err != nil {
			return "", fmt.Errorf("turn off the terminal's echo: %w", err)
		}
		defer func() {
			_ = terminal.Reset()
			fmt.Fprintln(os.Stderr)
		}()
	}
	fmt.Fprint(os.Stderr, question)
	line, err := bufio.NewReader(io.LimitReader(in, maxLine)).ReadString('\n')
	if err == io.EOF && line != "" {
		err = nil
	}
	return strings.TrimRight(line, "\r\n"), err
}
