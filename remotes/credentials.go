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

// keyring holds the credential files of docker and podman (config.json, containers-auth.json(5)). A file that can't be
// read counts as one without credentials, so that anonymous pulls still work. The reason is kept, to explain a pull
// that is refused later.
type keyring struct {
	files     []authFile
	searched  []string // names of all files, including missing ones
	readError string   // the last error that reading a file gave, or ""
}

// authFile is the parsed content of a credential file, as far as it is used.
type authFile struct {
	name        string
	Auths       map[string]json.RawMessage `json:"auths"`
	CredHelpers map[string]string          `json:"credHelpers"`
	CredsStore  string                     `json:"credsStore"`
}

// newKeyring reads the files. named says that the user chose the file, so that a missing one is an error too.
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
		k.searched = append(k.searched, name)
		if named || !errors.Is(err, os.ErrNotExist) {
			k.keepError(err)
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
	k.searched = append(k.searched, name)
	f, err := parseAuthFile(name, content)
	if err != nil {
		k.keepError(err)
		return
	}
	k.files = append(k.files, f)
}

// parseAuthFile parses a credential file, which may be blank. Its error doesn't quote the content, which may be secret.
func parseAuthFile(name string, content []byte) (authFile, error) {
	f := authFile{name: name}
	if len(bytes.TrimSpace(content)) > 0 && json.Unmarshal(content, &f) != nil {
		return f, fmt.Errorf("%s is not JSON in the form of docker's config.json", name)
	}
	return f, nil
}

func (k *keyring) keepError(err error) { k.readError = "credentials: " + printable(err.Error()) }

// candidate is a credential for a host, or a helper that may have one.
type candidate struct {
	auth.Credential
	helper, server string // the helper's name, and the key to ask it for
}

// candidates lists what the files have for a repository, the best first: file by file, in each file the longest prefix
// of the repository first, and the host last (containers-auth.json(5)). A helper comes before an entry of the same
// name.
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
					k.keepError(fmt.Errorf("%s: the entry %s %w", f.name, key, err))
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

// keysOf lists the keys of m that denote a host, or a host and path. The order is fixed: keys without a scheme, which
// tools write today, come first.
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
	// dockerHubServer is docker's key for the credentials of Docker Hub.
	dockerHubServer = "https://index.docker.io/v1/"
)

// authKey returns a file's key in canonical form: a host with its port, and the path, if any. Old files have URLs as
// keys, with the path of an API version.
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

// authHost returns a host in canonical form. Docker Hub has three names.
func authHost(scheme, host string) string {
	switch h := hostPort("https", host); h {
	case "docker.io:443", "index.docker.io:443", "registry-1.docker.io:443":
		return dockerHub + ":443"
	default:
		return hostPort(scheme, host)
	}
}

// parseAuth parses an entry of a file. Its errors don't quote the entry, which holds a secret.
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

// login holds a keyring's credentials for one repository on one host, and what became of them.
type login struct {
	keys     *keyring
	name     string // of the repository, with its host
	options  []candidate
	identity string // changes if the credentials in the files change

	mu          sync.Mutex
	asked       bool // a credential was asked for
	found       *auth.Credential
	helperError string
	withheld    string   // the token server that didn't get the credential
	unsupported []string // the schemes that the registry offers, if none is supported
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

// credential returns the best credential. It runs helpers only once, since they can be slow.
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
				l.helperError = "credentials: " + printable(err.Error())
			}
		}
		if found != auth.EmptyCredential {
			break
		}
	}
	l.found = &found
	return found, nil
}

// withhold records that the credential was not sent to a token server.
func (l *login) withhold(realm string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.withheld = realm
}

// offer records the schemes that a registry offers, none of which is supported.
func (l *login) offer(schemes []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unsupported = schemes
}

// explain returns how the credentials may be the reason for a refusal, or "".
func (l *login) explain() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch failure := cmp.Or(l.helperError, l.keys.readError); {
	case l.withheld != "":
		return "credentials were not sent to its token server: " + nameRealm(l.withheld)
	case len(l.unsupported) > 0:
		return "the registry wants authentication by " + printable(strings.Join(l.unsupported, " or ")) + "; only Bearer and Basic are supported"
	case failure != "":
		return failure
	case l.asked && l.found != nil && *l.found == auth.EmptyCredential:
		return "no credentials for " + l.name + " in " + strings.Join(l.keys.searched, ", ") + "; dist-login stores some"
	}
	return ""
}

// nameRealm returns the advice how to allow a token server.
func nameRealm(origin string) string {
	return fmt.Sprintf("to allow it, write realm = [%q] into the host's hosts.toml", origin)
}

// systemRun is where podman keeps credentials of users without XDG_RUNTIME_DIR.
var systemRun = "/run/containers"

// configFiles returns the credential files to read, in order: the one that the user named or else docker's
// configuration, and then those that podman and skopeo write.
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

// userConfig returns a path in the user's configuration directory, or "" if there is no such directory.
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
