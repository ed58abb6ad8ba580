package remotes

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// keyring holds the files in which docker and podman keep credentials, as config.json and
// containers-auth.json(5) describe them. What can't be read counts as no credentials, so that it
// breaks no anonymous pull; the reason is kept for the error of a pull that is then refused.
type keyring struct {
	files   []authFile
	looked  []string // the names of all files, also of those that are not there
	trouble string
}

// authFile is the content of one file, as far as it is used.
type authFile struct {
	name        string
	Auths       map[string]json.RawMessage `json:"auths"`
	CredHelpers map[string]string          `json:"credHelpers"`
	CredsStore  string                     `json:"credsStore"`
}

// newKeyring reads the files. If the user has named them, one that is missing is reported, too.
func newKeyring(files []string, named bool) *keyring {
	k := &keyring{}
	if text := os.Getenv("DOCKER_AUTH_CONFIG"); text != "" && !named {
		k.add("DOCKER_AUTH_CONFIG", []byte(text))
	}
	for _, name := range files {
		b, err := readAuthFile(name)
		if err == nil {
			k.add(name, b)
			continue
		}
		k.looked = append(k.looked, name)
		if named || !errors.Is(err, os.ErrNotExist) {
			k.complain(err)
		}
	}
	return k
}

func readAuthFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxManifest+1))
	if err == nil && len(b) > MaxManifest {
		err = fmt.Errorf("%s is larger than %s", name, sizeString(MaxManifest))
	}
	return b, err
}

func (k *keyring) add(name string, content []byte) {
	k.looked = append(k.looked, name)
	f, err := parseAuthFile(name, content)
	if err != nil {
		k.complain(err)
		return
	}
	k.files = append(k.files, f)
}

// parseAuthFile reads the content of a file, which may be blank. Its error does not quote what it could not read, which may be
// a secret.
func parseAuthFile(name string, content []byte) (authFile, error) {
	f := authFile{name: name}
	if len(bytes.TrimSpace(content)) > 0 && json.Unmarshal(content, &f) != nil {
		return f, fmt.Errorf("%s is not JSON in the form of docker's config.json", name)
	}
	return f, nil
}

func (k *keyring) complain(err error) { k.trouble = "credentials: " + printable(err.Error()) }

// candidate is a credential for a host, or the helper that may have it.
type candidate struct {
	auth.Credential
	helper, server string // the helper's name, and what it is asked for
}

// candidates lists what the files have for a repository of a host, the best first: file by file, in
// each the longest prefix of the repository first and the host last (containers-auth.json(5)). A helper
// comes before an entry of the same name.
func (k *keyring) candidates(scheme, hostport, repository string) (list []candidate) {
	host := authHost(scheme, hostport)
	servers := []string{hostport}
	if host == authHost(scheme, dockerHub) {
		servers = []string{dockerHubServer, dockerHub}
	}
	for _, f := range k.files {
		for prefix := host + "/" + repository; prefix != ""; prefix = parentPrefix(prefix) {
			for _, key := range keysOf(f.CredHelpers, scheme, prefix) {
				if name := f.CredHelpers[key]; name == "" {
					continue
				} else if prefix == host {
					list = appendHelper(list, name, servers)
				} else {
					list = appendHelper(list, name, []string{key})
				}
			}
			if prefix == host && f.CredsStore != "" {
				list = appendHelper(list, f.CredsStore, servers)
			}
			for _, key := range keysOf(f.Auths, scheme, prefix) {
				c, err := parseAuth(f.Auths[key])
				if err != nil {
					k.complain(fmt.Errorf("%s: the entry %s %w", f.name, key, err))
				} else if c != auth.EmptyCredential {
					list = append(list, candidate{Credential: c})
				}
			}
		}
	}
	return list
}

func appendHelper(list []candidate, name string, servers []string) []candidate {
	for _, server := range servers {
		list = append(list, candidate{helper: name, server: server})
	}
	return list
}

func parentPrefix(prefix string) string {
	i := strings.LastIndexByte(prefix, '/')
	return prefix[:max(i, 0)]
}

// keysOf lists the keys that are spellings of a host, or of a host and path. The order is fixed: keys
// without a scheme, as tools write them today, come first.
func keysOf[V any](m map[string]V, scheme, prefix string) (keys []string) {
	for key := range m {
		if authKey(scheme, key) == prefix {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, func(a, b string) int {
		if c := cmp.Compare(strings.Count(a, "://"), strings.Count(b, "://")); c != 0 {
			return c
		}
		return cmp.Compare(a, b)
	})
	return keys
}

const (
	dockerHub = "docker.io"
	// dockerHubServer is the key under which docker keeps the credentials of its own registry.
	dockerHubServer = "https://index.docker.io/v1/"
)

// authKey returns a key of a file in canonical form: a host with its port, and a path if there is one.
// Old files have URLs as keys, with the path of an API version.
func authKey(scheme, key string) string {
	rest, isURL := key, false
	for _, p := range []string{"https://", "http://"} {
		if len(key) > len(p) && strings.EqualFold(key[:len(p)], p) {
			rest, isURL = key[len(p):], true
		}
	}
	host, path, _ := strings.Cut(rest, "/")
	host, path = authHost(scheme, host), strings.TrimRight(path, "/")
	if (isURL || host == authHost(scheme, dockerHub)) && (path == "v1" || path == "v2") {
		path = ""
	}
	if path == "" {
		return host
	}
	return host + "/" + path
}

// authHost returns a host in canonical form. docker.io has three names.
func authHost(scheme, host string) string {
	switch h := hostPort("https", host); h {
	case "docker.io:443", "index.docker.io:443", "registry-1.docker.io:443":
		return dockerHub + ":443"
	default:
		return hostPort(scheme, host)
	}
}

// parseAuth reads one entry. Its errors don't quote the entry, which holds a secret.
func parseAuth(b []byte) (auth.Credential, error) {
	var e struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
		RegistryToken string `json:"registrytoken"`
	}
	if json.Unmarshal(b, &e) != nil {
		return auth.EmptyCredential, errors.New("is not an object of strings")
	}
	c := auth.Credential{Username: e.Username, Password: e.Password, RefreshToken: e.IdentityToken, AccessToken: e.RegistryToken}
	if e.Auth != "" {
		text, err := base64.StdEncoding.DecodeString(e.Auth)
		user, password, ok := strings.Cut(string(text), ":")
		if err != nil || !ok {
			return auth.EmptyCredential, errors.New("has an auth that is not USER:PASSWORD in base64")
		}
		c.Username, c.Password = user, strings.Trim(password, "\x00")
	}
	return c, nil
}

// login is what a keyring has for a repository at one host.
type login struct {
	keys     *keyring
	name     string // of the repository, with its host
	options  []candidate
	identity string // changes with what the files have for the repository

	mu       sync.Mutex
	asked    bool // for a credential
	found    *auth.Credential
	trouble  string
	withheld string   // the token server that the credential was not sent to
	unspoken []string // the schemes of authentication that the registry offers, if none of them is spoken here
}

func (k *keyring) login(scheme, host, repository string) *login {
	name := host
	if authHost(scheme, host) == authHost(scheme, dockerHub) {
		name = dockerHub
	}
	l := &login{keys: k, name: name + "/" + repository, options: k.candidates(scheme, host, repository)}
	h := sha256.New()
	for _, c := range l.options {
		fmt.Fprintf(h, "%q\n", []string{c.helper, c.server, fingerprint(c.Credential)})
	}
	l.identity = hex.EncodeToString(h.Sum(nil))
	return l
}

func fingerprint(c auth.Credential) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", []string{c.Username, c.Password, c.RefreshToken, c.AccessToken}))
	return hex.EncodeToString(sum[:])
}

// credential returns the best credential. It asks helpers only once, since they can be slow.
func (l *login) credential(ctx context.Context) (auth.Credential, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked = true
	if l.found != nil {
		return *l.found, nil
	}
	var found auth.Credential
	for _, c := range l.options {
		found = c.Credential
		if c.helper != "" {
			var err error
			if found, err = credentials.NewNativeStore(c.helper).Get(ctx, c.server); err != nil {
				if ctx.Err() != nil {
					return auth.EmptyCredential, ctx.Err()
				}
				l.trouble = "credentials: " + printable(err.Error())
			}
		}
		if found != auth.EmptyCredential {
			break
		}
	}
	l.found = &found
	return found, nil
}

// withhold records a token server that the credential was not sent to.
func (l *login) withhold(realm string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.withheld = realm
}

// offer records the schemes of a challenge that can't be met.
func (l *login) offer(schemes []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unspoken = schemes
}

// explain returns what the credentials may have to do with a refusal, or "".
func (l *login) explain() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch trouble := cmp.Or(l.trouble, l.keys.trouble); {
	case l.withheld != "":
		return "credentials were not sent to its token server: " + nameRealm(l.withheld)
	case len(l.unspoken) > 0:
		return "it wants authentication by " + printable(strings.Join(l.unspoken, " or ")) + "; Bearer and Basic are spoken here"
	case trouble != "":
		return trouble
	case l.asked && l.found != nil && *l.found == auth.EmptyCredential:
		return "no credentials for " + l.name + " in " + strings.Join(l.keys.looked, ", ")
	}
	return ""
}

// nameRealm says how to allow a token server.
func nameRealm(origin string) string {
	return fmt.Sprintf("to allow it, write realm = [%q] into the host's hosts.toml", origin)
}

// systemRun is where podman keeps the credentials of users who have no XDG_RUNTIME_DIR.
var systemRun = "/run/containers"

// configFiles are where credentials are looked for: the one file that was named where one was, else
// docker's configuration, then what podman and skopeo write.
func configFiles(o Options) (files []string, named bool) {
	if file := cmp.Or(o.AuthFile, os.Getenv("REGISTRY_AUTH_FILE")); file != "" {
		return []string{file}, true
	}
	home, _ := os.UserHomeDir()
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		files = append(files, filepath.Join(dir, "config.json"))
	} else if home != "" {
		files = append(files, filepath.Join(home, ".docker", "config.json"))
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		files = append(files, filepath.Join(dir, "containers", "auth.json"))
	} else {
		files = append(files, filepath.Join(systemRun, strconv.Itoa(os.Getuid()), "auth.json"))
	}
	if file := userConfig("containers", "auth.json"); file != "" {
		files = append(files, file)
	}
	return files, false
}

// userConfig returns a path below the directory of the user's configuration, "" if there is none.
func userConfig(path ...string) string {
	dir := os.Getenv("XDG_CONFIG_HOME")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return ""
		}
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(append([]string{dir}, path...)...)
}
