// Package sibling finds the commands that were installed together with the running one.
package sibling

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Dirs returns the directories of the commands: libexec/distkit, for those whose names other programs use too, and this
// program's own.
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

// Path returns the path of a command in one of Dirs, or else its name, to be looked up in PATH.
func Path(name string) string {
	for _, dir := range Dirs() {
		if path := filepath.Join(dir, name); unix.Access(path, unix.X_OK) == nil {
			return path
		}
	}
	return name
}
