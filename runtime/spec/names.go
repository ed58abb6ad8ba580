package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// HostGateway, in the place of an address in [Names.Hosts], is the address by which the network reaches the host, as in docker.
const HostGateway = "host-gateway"

// NameFiles are the files that tell a container names, its own among them.
var NameFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// Names says how a container finds hosts by their names.
type Names struct {
	Hostname string   `json:"hostname,omitempty"` // its own
	Hosts    []string `json:"hosts,omitempty"`    // NAME:ADDRESS or NAME:host-gateway
	// These take the place of the host's name servers, search domains and options. A single "." is no search domain.
	Servers []string `json:"dns,omitempty"`
	Search  []string `json:"dnsSearch,omitempty"`
	Options []string `json:"dnsOptions,omitempty"`
}

// Given reports whether n says more than the container's own name.
func (n Names) Given() bool { return len(n.Hosts) > 0 || n.Resolves() }

// Resolves reports whether n says something about resolv.conf.
func (n Names) Resolves() bool { return len(n.Servers)+len(n.Search)+len(n.Options) > 0 }

// Check returns InvalidArgument if a name, an address or an option can't be in its file.
func (n Names) Check() error {
	for _, s := range n.Hosts {
		if _, _, err := splitHost(s); err != nil {
			return err
		}
	}
	for _, s := range n.Servers {
		if _, err := netip.ParseAddr(s); err != nil {
			return invalid("name server %q is not an IP address", s)
		}
	}
	for what, list := range map[string][]string{"host name": {n.Hostname}, "search domain": n.Search, "option of resolv.conf": n.Options} {
		for _, s := range list {
			if !isWord(s) && (s != "" || what != "host name") {
				return invalid("%s %q: want letters, digits and . - _ :", what, s)
			}
		}
	}
	return nil
}

// isWord reports whether a word in one of the files is no more than a word, whoever reads it.
func isWord(s string) bool {
	return s != "" && len(s) <= 253 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(".-_:", r)
	})
}

// splitHost splits NAME:ADDRESS.
func splitHost(s string) (name, address string, err error) {
	name, address, _ = strings.Cut(s, ":")
	address = strings.TrimSuffix(strings.TrimPrefix(address, "["), "]")
	if _, err := netip.ParseAddr(address); err != nil && address != HostGateway || !isWord(name) {
		return "", "", invalid("host %q: want NAME:ADDRESS or NAME:%s", s, HostGateway)
	}
	return name, address, nil
}

// HostsFile returns the /etc/hosts of a container with these addresses of its own: 127.0.1.1, as Debian has it, if there
// are none. The gateway is the host's address for it; InvalidArgument if a host needs one and it is "".
func (n Names) HostsFile(own []string, gateway string) (string, error) {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n" +
		"ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	if len(own) == 0 {
		own = []string{"127.0.1.1"}
	}
	for _, a := range own {
		if n.Hostname != "" {
			fmt.Fprintf(&b, "%s\t%s\n", a, n.Hostname)
		}
	}
	err := n.writeHosts(&b, gateway)
	return b.String(), err
}

// AddHosts appends the hosts to the text of a hosts file.
func (n Names) AddHosts(file string) (string, error) {
	var b strings.Builder
	b.WriteString(strings.TrimSuffix(file, "\n") + "\n")
	err := n.writeHosts(&b, "")
	return b.String(), err
}

func (n Names) writeHosts(b *strings.Builder, gateway string) error {
	for _, s := range n.Hosts {
		name, address, err := splitHost(s)
		if err != nil {
			return err
		}
		if address == HostGateway {
			address = gateway
		}
		if address == "" {
			return invalid("host %q: this network has no gateway", s)
		}
		fmt.Fprintf(b, "%s\t%s\n", address, name)
	}
	return nil
}

// ResolvConf returns the resolv.conf of a container, made from the text of the host's. Servers reports whether it has a name
// server. In a network of its own (isolated) a container reaches neither loopback addresses of the host nor addresses that are
// those of a link of the host's, such as fe80::1%eth0: these servers are left out.
func (n Names) ResolvConf(host string, isolated bool) (conf string, servers bool) {
	var b strings.Builder
	for line := range strings.Lines(host) {
		words := append(strings.Fields(line), "", "")
		switch words[0] {
		case "nameserver":
			a, err := netip.ParseAddr(words[1])
			if len(n.Servers) > 0 || err == nil && isolated && (a.Unmap().IsLoopback() || a.Zone() != "") {
				continue
			}
			servers = servers || words[1] != ""
		case "search", "domain":
			if len(n.Search) > 0 {
				continue
			}
		case "options":
			if len(n.Options) > 0 {
				continue
			}
		}
		b.WriteString(strings.TrimRight(line, "\n") + "\n")
	}
	for _, s := range n.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
		servers = true
	}
	if len(n.Search) > 0 && !slices.Equal(n.Search, []string{"."}) {
		fmt.Fprintf(&b, "search %s\n", strings.Join(n.Search, " "))
	}
	if len(n.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(n.Options, " "))
	}
	return b.String(), servers
}
