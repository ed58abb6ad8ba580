package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"distkit/disk"
)

// Refused returns an error if standard output, to which a command would write what is no text, is a terminal. It names the flags that would
// send it elsewhere.
func Refused(flags ...string) error {
	if _, ok := IsTerminal(os.Stdout); !ok {
		return nil
	}
	instead := ""
	for _, f := range flags {
		instead += ", or give --" + f
	}
	return Usagef("standard output is a terminal: redirect it to a file or a pipe%s", instead)
}

// CreateOutput makes a file by write, which appears under its name when it is whole and on disk, in place of a file of that name. If it
// fails, nothing is left. A name of what is no regular file is wrong usage. The directory of the file is for temporary files, too.
func CreateOutput(c *cobra.Command, name string, write func(f *os.File, dir string) error) error {
	switch info, err := os.Lstat(name); {
	case err == nil && !info.Mode().IsRegular():
		return Usagef("--output: %s is not a regular file: use standard output", name)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	dir := filepath.Dir(name)
	t, tmp := disk.Tree(dir), fmt.Sprintf(".%s-%016x", c.Root().Name(), rand.Uint64()) // no lock excludes another run
	err := t.CreateBy(tmp, 0o644, true, func(f *os.File) error { return write(f, dir) })
	if err == nil {
		err = t.Rename(tmp, filepath.Base(name))
	}
	if err != nil {
		_ = t.Remove(tmp)
		return err
	}
	return disk.SyncDir(dir)
}
