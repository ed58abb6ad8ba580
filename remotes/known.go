package remotes

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// AuthFile is a file in which credentials are looked for, and what it has, without secrets.
type AuthFile struct {
	Path    string   // DOCKER_AUTH_CONFIG for the variable of that name
	Hosts   []string // with credentials, or a helper that is asked for them, sorted
	Default string   // the helper that is asked for every other host, "" if none is
	Err     error    // why it can't be read
}

// AuthFiles are the files there are, in the order in which they are read, and those that were named.
func AuthFiles(o Options) (files []AuthFile) {
	add := func(path string, content []byte, err error) {
		f := AuthFile{Path: path, Err: err}
		if parsed, err := parseAuthFile(path, content); err != nil {
			f.Err = err
		} else {
			for host := range parsed.Auths {
				f.Hosts = append(f.Hosts, host)
			}
			for host := range parsed.CredHelpers {
				f.Hosts = append(f.Hosts, host)
			}
			f.Default = parsed.CredsStore
		}
		slices.Sort(f.Hosts)
		f.Hosts = slices.Compact(f.Hosts)
		files = append(files, f)
	}
	names, named := configFiles(o)
	if text := os.Getenv("DOCKER_AUTH_CONFIG"); text != "" && !named {
		add("DOCKER_AUTH_CONFIG", []byte(text), nil)
	}
	for _, name := range names {
		if b, err := readAuthFile(name); named || !errors.Is(err, os.ErrNotExist) {
			add(name, b, err)
		}
	}
	return files
}

// ConfiguredHosts are the hosts that have a directory of their own for a hosts.toml or certificates, by the directories' names, sorted.
func ConfiguredHosts(o Options) (hosts []string) {
	for _, root := range hostRoots(o) {
		entries, _ := os.ReadDir(root) // a root may be missing
		for _, e := range entries {
			if info, err := os.Stat(filepath.Join(root, e.Name())); err == nil && info.IsDir() && !strings.HasPrefix(e.Name(), ".") {
				hosts = append(hosts, e.Name())
			}
		}
	}
	slices.Sort(hosts)
	return slices.Compact(hosts)
}
