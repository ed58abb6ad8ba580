// Package network makes network namespaces that outlive the process that made them. It connects them with CNI plugins
// (https://www.cni.dev/docs/spec/) or, for an ordinary user, with pasta.
//
// [Find] checks a request and finds its configuration. [Networks.Add] makes the network, [Networks.Down] and
// [Networks.Up] disconnect it and connect it again, and [Networks.Delete] removes it. Error classes: NotFound,
// AlreadyExists, InvalidArgument, NotImplemented (a plugin or program is missing), PermissionDenied, and Unavailable (a
// port is taken, or another process works on the network).
//
// A network is a directory below the state directory, which does not survive a boot. The request to CNI or pasta is
// written there before any program runs. So [Networks.Delete] can remove whatever a killed process has left. The
// directory has:
//
//	lock             held by the process that works on the network
//	connection.json  the request for a container's record, to make the network again after a boot
//	request.json     the request to the plugins, or to pasta
//	netns            the network namespace, mounted; while it exists, the network's ports are taken
//	etc/             hosts, hostname and resolv.conf, in a file system of their own
//	cni/             the plugins' results, needed to disconnect
//	pasta.pid        process number of pasta
//	result.json      exists while the network is connected
//
// Two more locks are for what concerns several networks: networks.lock beside the directory, for ports and names, and
// bridge.lock in /run/distkit, for the host's bridge.
package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"distkit/disk"
	"distkit/errclass"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	types "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
)

// ifName is the name of the interface in the network namespace.
const ifName = "eth0"

// Networks are the networks of a namespace of IDs.
type Networks struct {
	dir       string
	namespace string
	plugins   []string
}

// Open opens the networks below a state directory (see [runtime.DefaultState]). plugins are the directories with CNI's
// plugins.
func Open(state, namespace string, plugins []string) (*Networks, error) {
	if err := runtime.CheckID(namespace); err != nil {
		return nil, fmt.Errorf("namespace: %w", err)
	}
	state, err := filepath.Abs(state)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return &Networks{filepath.Join(state, "networks"), namespace, plugins}, nil
}

// Locate finds a network of this state directory by the path of its network namespace. It returns the networks of the
// same namespace of IDs, and the network's ID. A path outside of the state directory is InvalidArgument: the files
// beside it are not trusted.
func (n *Networks) Locate(path string) (*Networks, string, error) {
	dir := filepath.Dir(path)
	namespace, id, has := strings.Cut(filepath.Base(dir), "+")
	if !has {
		namespace, id = "default", namespace
	}
	if filepath.Base(path) != "netns" || filepath.Dir(dir) != n.dir || runtime.CheckID(id) != nil {
		return nil, "", errclass.Errorf(errdefs.ErrInvalidArgument, "%q is no network's path in %s", path, n.dir)
	}
	of, err := Open(filepath.Dir(n.dir), namespace, n.plugins)
	return of, id, err
}

// Network is a connected network namespace.
type Network struct {
	ID        string        `json:"id"`
	Namespace string        `json:"namespace"`
	Path      string        `json:"path"` // of the network namespace
	Name      string        `json:"name"` // of CNI's configuration, or pasta
	Addresses []string      `json:"addresses"`
	Ports     []Port        `json:"ports,omitempty"`
	Result    *types.Result `json:"result"` // of CNI's plugins, or an equivalent
	// Files are the files that resolve names, by their paths in a container.
	Files map[string]string `json:"files"`
}

// request is the content of request.json.
type request struct {
	ID        string          `json:"id"`
	Namespace string          `json:"namespace"`
	Config    json.RawMessage `json:"config,omitempty"` // CNI's configuration
	Pasta     *pasta          `json:"pasta,omitempty"`  // used instead of CNI, if not nil
	Ports     []Port          `json:"ports,omitempty"`
	Names     spec.Names      `json:"names"`
}

// place is a network's directory, locked.
type place struct {
	dir  string
	lock *os.File
}

func (p place) file(name string) string { return filepath.Join(p.dir, name) }

// files lists the files in a network's directory, in the order in which they are removed.
var files = []string{"connection.json", "connection.json.new", "result.json", "result.json.new", "request.json", "request.json.new", pastaPid, "lock"}

func (n *Networks) path(id string) (string, error) {
	key, err := runtime.Key(n.namespace, id)
	return filepath.Join(n.dir, key), err
}

// Paths returns the path of the network namespace for an ID, whether it exists or not, and the files that resolve
// names, by their paths in a container.
func (n *Networks) Paths(id string) (netns string, files map[string]string, err error) {
	dir, err := n.path(id)
	p := place{dir: dir}
	return p.file("netns"), p.nameFiles(), err
}

// open locks the directory of a network. With create, it makes the directory if need be. NotFound: there is none.
// Unavailable: another process works on the network.
func (n *Networks) open(id string, create bool) (place, error) {
	dir, err := n.path(id)
	if err != nil {
		return place{}, err
	}
	for range 100 {
		if create {
			if err := runtime.PrivateDir(filepath.Dir(n.dir)); err != nil {
				return place{}, err
			}
			if err := runtime.PrivateDir(n.dir); err != nil {
				return place{}, err
			}
			if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return place{}, err
			}
		}
		flags := os.O_RDWR
		if create {
			flags |= os.O_CREATE
		}
		lock, err := os.OpenFile(filepath.Join(dir, "lock"), flags, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			if create {
				continue // its last owner has just removed the directory
			}
			if _, err := os.Lstat(dir); err == nil { // the maker was killed before it made the lock
				create = true
				continue
			}
			return place{}, errclass.Errorf(errdefs.ErrNotFound, "network %s: not found", id)
		}
		if err != nil {
			return place{}, err
		}
		err = disk.Lock(lock, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("network %s: %w", id, disk.Busy(lock))
		}
		if err != nil {
			_ = lock.Close()
			return place{}, err
		}
		locked, err := lock.Stat()
		if now, serr := os.Lstat(lock.Name()); err == nil && serr == nil && os.SameFile(locked, now) {
			return place{dir, lock}, nil
		}
		_ = lock.Close()
	}
	return place{}, errclass.Errorf(errdefs.ErrUnavailable, "network %s: it is removed again and again", id)
}

// connector connects a network namespace to other hosts.
type connector interface {
	check(ports []Port) error // called before anything is made
	add(ctx context.Context, p place, r request) (*types.Result, error)
	del(ctx context.Context, p place, r request) error // also undoes an add that has failed or was killed
}

func (n *Networks) connector(r request) (connector, error) {
	if r.Pasta != nil {
		return r.Pasta, nil
	}
	config, err := libcni.NetworkConfFromBytes(r.Config)
	return &cni{n, config}, err
}

// Add makes a network: its namespace, connected as the configuration says, with the ports and names of w. It first
// removes what a killed process has left of a network with this ID. After an error nothing is left. AlreadyExists: the
// ID has a network. NotImplemented: a plugin is not installed. Unavailable: a port is taken.
func (n *Networks) Add(ctx context.Context, id string, w Wanted) (_ *Network, err error) {
	wanted := request{ID: id, Namespace: n.namespace, Pasta: w.pasta, Ports: w.ports, Names: w.connection.Names}
	if w.config != nil {
		wanted.Config = w.config.Bytes
	}
	if wanted.Names.Hostname == "" {
		wanted.Names.Hostname = id
	}
	by, err := n.connector(wanted)
	if err == nil {
		err = by.check(wanted.Ports)
	}
	if err != nil {
		return nil, err
	}
	p, err := n.open(id, true)
	if err != nil {
		return nil, err
	}
	defer p.lock.Close()
	if _, err := os.Lstat(p.file("result.json")); err == nil {
		return nil, errclass.Errorf(errdefs.ErrAlreadyExists, "network %s: already exists", id)
	}
	r, err := p.request()
	if err == nil {
		err = n.disconnect(ctx, p, r)
	} else if errdefs.IsNotFound(err) {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("network %s: remove what was left of it: %w", id, err)
	}
	err = p.write("request.json", wanted)
	if err == nil {
		err = p.write("connection.json", w.connection)
	}
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", id, err)
	}
	return n.connect(ctx, p, wanted, by, p.remove)
}

// connect makes a network's namespace and connects it. After an error it disconnects it, and undone undoes the rest.
func (n *Networks) connect(ctx context.Context, p place, r request, by connector, undone func() error) (_ *Network, err error) {
	if err := n.reserve(ctx, p, r); err != nil {
		_ = errors.Join(unmountAll(p.file("netns")), undone())
		return nil, fmt.Errorf("network %s: %w", r.ID, err)
	}
	defer func() {
		if err == nil {
			return
		}
		err = fmt.Errorf("network %s: %w", r.ID, err)
		// The programs must undo their work even if ctx is done.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if derr := n.disconnect(ctx, p, r); derr == nil {
			_ = undone()
		}
	}()
	release, err := using(ctx, r)
	if err != nil {
		return nil, err
	}
	defer release()
	result, err := by.add(ctx, p, r)
	if err != nil {
		return nil, err
	}
	if err := p.writeNames(r, result); err != nil {
		return nil, err
	}
	net := r.network(p, result)
	lock, err := n.lockAll(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := forwardPublished(ctx, net); err != nil {
		return nil, err
	}
	if err := p.write("result.json", result); err != nil {
		return nil, err
	}
	return net, n.announce(p, r)
}

// Down disconnects a network and removes its namespace. It keeps the request, for [Networks.Up]. If there is no such
// network, it succeeds.
func (n *Networks) Down(ctx context.Context, id string) error {
	p, err := n.open(id, false)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.lock.Close()
	r, err := p.request()
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil {
		err = n.disconnect(ctx, p, r)
	}
	if err != nil {
		return fmt.Errorf("network %s: %w", id, err)
	}
	return nil
}

// Up connects a network that is down according to its request. The addresses may be new ones. If the network is up,
// nothing changes. NotFound: there is no such network.
func (n *Networks) Up(ctx context.Context, id string) (*Network, error) {
	p, err := n.open(id, false)
	if err != nil {
		return nil, err
	}
	defer p.lock.Close()
	r, err := p.request()
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", id, err)
	}
	if net, ok := p.connected(r); ok {
		return net, nil
	}
	by, err := n.connector(r)
	if err == nil {
		err = by.check(r.Ports)
	}
	if err == nil { // left by a killed process
		err = n.disconnect(ctx, p, r)
	}
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", id, err)
	}
	return n.connect(ctx, p, r, by, func() error { return nil })
}

// connected reads the result of a connected network. It reports false if the network is not connected.
func (p place) connected(r request) (*Network, bool) {
	var result types.Result
	b, err := os.ReadFile(p.file("result.json"))
	if err != nil || json.Unmarshal(b, &result) != nil {
		return nil, false
	}
	return r.network(p, &result), true
}

// Delete disconnects and removes a network. If there is no such network, it succeeds.
func (n *Networks) Delete(ctx context.Context, id string) error {
	p, err := n.open(id, false)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.lock.Close()
	r, err := p.request()
	if err == nil {
		err = n.disconnect(ctx, p, r)
	}
	if err == nil || errdefs.IsNotFound(err) {
		err = p.remove()
	}
	if err != nil {
		return fmt.Errorf("network %s: %w", id, err)
	}
	return nil
}

// List returns the connected networks of this namespace, sorted by ID.
func (n *Networks) List(ctx context.Context) ([]*Network, error) {
	entries, err := os.ReadDir(n.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	var all []*Network
	for _, e := range entries {
		p := place{dir: filepath.Join(n.dir, e.Name())}
		r, err := p.request()
		if err != nil || r.Namespace != n.namespace {
			continue
		}
		if net, ok := p.connected(r); ok {
			all = append(all, net)
		}
	}
	slices.SortFunc(all, func(a, b *Network) int { return strings.Compare(a.ID, b.ID) })
	return all, ctx.Err()
}

// disconnect undoes the connection, complete or not, and removes the namespace and the names. After the last network it
// also cleans up the host.
func (n *Networks) disconnect(ctx context.Context, p place, r request) error {
	by, err := n.connector(r)
	if err != nil {
		return err
	}
	if err := n.unannounce(ctx, p, r); err != nil {
		return err
	}
	err = func() error {
		release, err := using(ctx, r)
		if err != nil {
			return err
		}
		defer release()
		if err := by.del(ctx, p, r); err != nil {
			return err
		}
		return errors.Join(unmountAll(p.file("netns")), unmountAll(p.file(namesDir)))
	}()
	if err == nil {
		tidy(ctx, r)
	}
	return err
}

// unannounce marks the network as not connected, and removes its name from the others.
func (n *Networks) unannounce(ctx context.Context, p place, r request) error {
	lock, err := n.lockAll(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := os.Remove(p.file("result.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return n.announce(p, r)
}

// cni connects a network with CNI plugins.
type cni struct {
	n      *Networks
	config *libcni.NetworkConfigList
}

func (c *cni) check(ports []Port) error { return c.n.check(c.config, ports) }

func (c *cni) add(ctx context.Context, p place, r request) (*types.Result, error) {
	if err := c.n.sweepLeases(ctx, p, r, c.config); err != nil {
		return nil, err
	}
	got, err := c.n.cni(p).AddNetworkList(ctx, c.config, r.runtimeConf(p))
	if err != nil {
		return nil, pluginError(ctx, err)
	}
	return types.GetResult(got)
}

func (c *cni) del(ctx context.Context, p place, r request) error {
	if err := c.n.cni(p).DelNetworkList(ctx, c.config, r.runtimeConf(p)); err != nil {
		return pluginError(ctx, err)
	}
	return nil
}

func (n *Networks) cni(p place) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(n.plugins, p.file("cni"), nil)
}

func (r request) runtimeConf(p place) *libcni.RuntimeConf {
	// IDs never have two separators in a row, so this is unique on the host.
	c := &libcni.RuntimeConf{ContainerID: r.Namespace + "--" + r.ID, NetNS: p.file("netns"), IfName: ifName}
	if len(r.Ports) > 0 {
		c.CapabilityArgs = map[string]any{"portMappings": r.Ports}
	}
	return c
}

func (r request) network(p place, result *types.Result) *Network {
	net := &Network{ID: r.ID, Namespace: r.Namespace, Path: p.file("netns"), Name: r.name(), Addresses: []string{}, Ports: r.Ports,
		Result: result, Files: p.nameFiles()}
	for _, ip := range result.IPs {
		net.Addresses = append(net.Addresses, ip.Address.String())
	}
	return net
}

// name returns the name of CNI's configuration, or [Pasta].
func (r request) name() string {
	if r.Pasta != nil {
		return Pasta
	}
	var config struct {
		Name string `json:"name"`
	}
	_ = json.Unmarshal(r.Config, &config) // valid: CNI has checked it
	return config.Name
}

// reaches reports whether two networks can reach each other, and so resolve each other's names: they are connected to
// the same network, in the same namespace of IDs. A pasta always connects a single network.
func (r request) reaches(other request) bool {
	return other.Namespace == r.Namespace && r.Pasta == nil && other.Pasta == nil && other.name() == r.name()
}

// onBridge reports whether the network is connected to the host's bridge.
func (r request) onBridge() bool { return r.name() == bridgeName }

// request reads the request. NotFound: a killed process has not written it.
func (p place) request() (r request, err error) {
	b, err := os.ReadFile(p.file("request.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return r, errclass.As(err, errdefs.ErrNotFound)
	}
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
}

// write replaces a file atomically. It is not synced, because nothing here survives a boot.
func (p place) write(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.WriteFile(p.file(name+".new"), append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(p.file(name+".new"), p.file(name))
}

// remove removes the directory, the lock last.
func (p place) remove() error {
	if err := errors.Join(unmountAll(p.file("netns")), unmountAll(p.file(namesDir))); err != nil {
		return err
	}
	if err := os.RemoveAll(p.file("cni")); err != nil {
		return err
	}
	for _, name := range files {
		if err := os.Remove(p.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Remove(p.dir)
}

// pluginError reduces a plugin's error to one line.
func pluginError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.New(strings.Join(strings.Fields(err.Error()), " "))
}
