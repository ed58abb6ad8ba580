// Package sibling finds the commands that were installed with the one that runs.
package sibling

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Dirs are the directories of the commands: libexec/distkit, for those whose names other programs have, too, and that of this program.
func Dirs() []string {
	self, err := os.Executable()
	if err != nil {
		return nil
	}
	if target, err := filepath.EvalSymlinks(self); err == nil {
		self = target
	}
	dir := filepath.Dir(self)
	if prefix, ok := strings.CutSuffix(dir, "/libexec/distkit"); ok {
		return []string{dir, filepath.Join(prefix, "bin")}
	}
	inner := filepath.Join(dir, "../libexec/distkit")
	if info, err := os.Stat(inner); err == nil && info.IsDir() {
		return []string{inner, dir}
	}
	return []string{dir}
}

// Path returns the path of a command: one of Dirs, else its name, for PATH.
func Path(name string) string {
	for _, dir := range Dirs() {
		if path := filepath.Join(dir, name); unix.Access(path, unix.X_OK) == nil {
			return path
		}
	}
	return name
}
