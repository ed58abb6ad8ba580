package remotes

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// AuthFile describes a file with credentials, without secrets.
type AuthFile struct {
	Path    string   // or DOCKER_AUTH_CONFIG for the environment variable of that name
	Hosts   []string // the hosts that it has credentials or a credential helper for, sorted
	Default string   // the helper for all other hosts; "" if there is none
	Err     error    // why the file can't be read, or nil
}

// AuthFiles returns the credential files in the order in which they are read. A file that was named explicitly is
// included even if it doesn't exist.
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

// ConfiguredHosts returns the names of hosts that have a directory for a hosts.toml or certificates, sorted.
func ConfiguredHosts(o Options) (hosts []string) {
	for _, root := range hostRoots(o) {
		entries, _ := os.ReadDir(root) // a root need not exist
		for _, e := range entries {
			if info, err := os.Stat(filepath.Join(root, e.Name())); err == nil && info.IsDir() && !strings.HasPrefix(e.Name(), ".") {
				hosts = append(hosts, e.Name())
			}
		}
	}
	slices.Sort(hosts)
	return slices.Compact(hosts)
}
