package create

import (
	"fmt"
	"io"
	"os"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/specflags"
	"distkit/runtime"

	"github.com/spf13/pflag"
)

// SecretFlags are the values of --secret.
type SecretFlags struct{ values []string }

// Secrets registers --secret.
func Secrets(f *pflag.FlagSet) *SecretFlags {
	w := &SecretFlags{}
	f.StringArrayVar(&w.values, "secret", nil, "let its user read what is in a file, or of - in standard input, as /run/secrets/NAME: `NAME=FILE` (can be repeated)")
	return w
}

// Read reads the secrets.
func (w *SecretFlags) Read(stdin io.Reader) ([]runtime.Secret, error) {
	secrets, err := ReadSecrets(w.values, stdin)
	if err != nil {
		return nil, fmt.Errorf("--secret: %w", err)
	}
	return secrets, nil
}

// ReadOnce returns the flag of a secret that can be read only once, or "".
func (w *SecretFlags) ReadOnce() string {
	for _, v := range w.values {
		if _, file, _ := strings.Cut(v, "="); file == "-" || specflags.IsStream(file) {
			return "--secret " + v
		}
	}
	return ""
}

// ReadSecrets reads secrets given as NAME=FILE. For one of them FILE may be -, which means standard input. All names
// are checked first.
func ReadSecrets(values []string, stdin io.Reader) ([]runtime.Secret, error) {
	var names, files []string
	for _, v := range values {
		name, file, ok := strings.Cut(v, "=")
		if !ok || file == "" {
			return nil, cli.Usagef("%.80q is not NAME=FILE", v)
		}
		for _, f := range files {
			if f == "-" && file == "-" {
				return nil, cli.Usagef("standard input is one secret, not two")
			}
		}
		names, files = append(names, name), append(files, file)
	}
	if err := runtime.CheckSecrets(names); err != nil {
		return nil, err
	}
	var secrets []runtime.Secret
	for i, file := range files {
		b, err := readSecret(file, stdin)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", names[i], err)
		}
		secrets = append(secrets, runtime.Secret{Name: names[i], Data: b})
	}
	return secrets, nil
}

// readSecret reads a file, up to the first byte beyond the limit.
func readSecret(name string, stdin io.Reader) ([]byte, error) {
	what := "standard input"
	if name != "-" {
		what = name
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		stdin = f
	}
	b, err := io.ReadAll(io.LimitReader(stdin, runtime.MaxSecret+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) == 0:
		return nil, cli.Usagef("%s is empty", what)
	case len(b) > runtime.MaxSecret:
		return nil, cli.Usagef("%s has more than %d bytes", what, runtime.MaxSecret)
	}
	return b, nil
}
