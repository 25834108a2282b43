"""Random walks of three replicas over a model of the coordinator, with frozen clocks and late news."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flwr_ha.replica.machine import MachineState, Phase, Timing, step
from flwr_ha.replica.messages import (
    Campaign,
    Elected,
    Event,
    Exit,
    ExtendLease,
    Fenced,
    NotElected,
    Renewed,
    Resign,
    RunSettled,
    Seen,
    StandDown,
    StartSuperLink,
    StopAsked,
    SuperLinkGone,
    SuperLinkReady,
    SwitchoverAsked,
    TakeOver,
    TakeoverFailed,
    Tick,
    TookOver,
)

LEASE_S, SESSION_S = 3.0, 4.0
TIMING = Timing(rest_s=3.0, longest_rest_s=10.0, defer_s=3.0, drain_s=30.0)
REPLICAS = st.integers(0, 2)


@dataclass
class Site:
    """One replica as the outside sees it.

    `news` is what its threads have said and the loop has not read yet; it may be read late, twice and
    in any order. A ballot is read once: the agent's thread says it once.
    """

    state: MachineState
    is_campaigning: bool = False
    ballot: Event | None = None
    is_superlink_up: bool = False
    superlink_until_s: float = 0.0
    news: list[Event] = field(default_factory=list)
    told_to_take_over: list[int] = field(default_factory=list)
    took_over: list[int] = field(default_factory=list)
    exits: int = 0


class Walk(RuleBasedStateMachine):
    """Let replicas campaign, freeze, lose sessions and SuperLinks, and be stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.sites = [Site(MachineState(replica_id=index)) for index in range(3)]
        self.term = 0
        self.leader: tuple[int, int] | None = None  # replica, term
        self.session_until_s = 0.0
        self.is_paused = False
        self.candidate: int | None = None
        self.winners: dict[int, int] = {}
        for site in self.sites:
            site.is_superlink_up = True
            self.feed(site, SuperLinkReady())

    def feed(self, site: Site, event: Event) -> None:
        """Let one replica read one event, and do what it says."""
        before = site.state
        site.state, actions = step(before, event, now_s=self.now_s, timing=TIMING)
        kinds = [type(action) for action in actions]
        gave_up = isinstance(event, Elected) or before.is_elected
        assert kinds.count(StandDown) == int(gave_up and not site.state.is_elected)
        assert site.state.term >= before.term
        for action in actions:
            match action:
                case Campaign():
                    assert isinstance(event, Seen)
                    assert not event.is_paused or event.term == 0 or event.candidate == site.state.replica_id
                    assert not site.is_campaigning
                    assert site.state.is_warm
                    site.is_campaigning = True
                case TakeOver(term=term):
                    site.told_to_take_over.append(term)
                case ExtendLease(until_s=until_s):
                    site.superlink_until_s = until_s
                case StandDown(term=term):
                    site.is_superlink_up, site.superlink_until_s = False, 0.0
                    self._resign(site, term)
                case Resign(term=term):
                    self._resign(site, term)
                case StartSuperLink():
                    assert not site.state.is_stopping
                    site.is_superlink_up, site.superlink_until_s = True, 0.0
                    site.news.append(SuperLinkReady())
                case Exit():
                    site.exits += 1
                    site.is_superlink_up = False

    def _resign(self, site: Site, term: int) -> None:
        if self.leader == (site.state.replica_id, term):
            self.leader = None

    # --- the world ---

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        """Nobody needs to notice: a replica that gets no event is frozen."""
        self.now_s += seconds
        if self.leader is not None and self.now_s >= self.session_until_s:
            self.leader = None

    @rule(replica=REPLICAS)
    def look(self, replica: int) -> None:
        """Read the coordinator, and leave the answer lying about for later, too."""
        seen = Seen(
            leader=self.leader[0] if self.leader else None,
            term=self.term,
            is_paused=self.is_paused and self.candidate is None,
            candidate=self.candidate,
        )
        self.sites[replica].news.append(seen)
        self._tick_and_feed(self.sites[replica], seen)

    def _tick_and_feed(self, site: Site, event: Event) -> None:
        """As the agent does: a lease that has run out counts before any other event."""
        self.feed(site, Tick())
        self.feed(site, event)

    @rule(replica=REPLICAS)
    def tick(self, replica: int) -> None:
        """Let the loop come round."""
        self.feed(self.sites[replica], Tick())

    @rule(replica=REPLICAS, data=st.data())
    def read_news(self, replica: int, data: st.DataObject) -> None:
        """Read anything that was ever said, again perhaps."""
        site = self.sites[replica]
        if site.news:
            self.feed(site, data.draw(st.sampled_from(site.news[-6:])))

    def is_campaigning(self) -> bool:
        """Whether a campaign waits for the coordinator."""
        return any(site.is_campaigning and site.ballot is None for site in self.sites)

    @precondition(is_campaigning)
    @rule(data=st.data())
    def vote(self, data: st.DataObject) -> None:
        """Let the coordinator decide on a campaign; the answer is still on its way."""
        site = data.draw(st.sampled_from([site for site in self.sites if site.is_campaigning and site.ballot is None]))
        replica = site.state.replica_id
        if self.leader is not None:
            site.ballot = NotElected("another replica leads")
            return
        self.term += 1
        self.candidate = None
        self.leader = (replica, self.term)
        self.session_until_s = self.now_s + SESSION_S
        self.winners[self.term] = replica
        site.ballot = Elected(self.term, self.now_s + LEASE_S)

    def has_ballot(self) -> bool:
        """Whether an answer to a campaign is on its way."""
        return any(site.ballot is not None for site in self.sites)

    @precondition(has_ballot)
    @rule(data=st.data(), is_lost=st.sampled_from([False, False, False, True]))
    def hear_ballot(self, data: st.DataObject, is_lost: bool) -> None:
        """Let the answer to a campaign come in; where it is lost, the replica thinks that it was not elected."""
        site = data.draw(st.sampled_from([site for site in self.sites if site.ballot is not None]))
        ballot, site.ballot, site.is_campaigning = site.ballot, None, False
        assert ballot is not None
        self._tick_and_feed(site, NotElected("the coordinator does not answer") if is_lost else ballot)

    def is_in_office(self) -> bool:
        """Whether somebody thinks that it leads."""
        return any(site.state.is_elected for site in self.sites)

    @precondition(is_in_office)
    @rule(data=st.data(), is_good=st.sampled_from([True, True, True, False]))
    def finish_takeover(self, data: st.DataObject, is_good: bool) -> None:
        """Let a thread end its takeover, of this term or of one that is over."""
        site = data.draw(st.sampled_from([site for site in self.sites if site.state.is_elected]))
        term = data.draw(st.sampled_from(site.told_to_take_over))
        if is_good:
            site.took_over.append(term)
        event = TookOver(term) if is_good else TakeoverFailed(term, "no copy")
        site.news.append(event)
        self._tick_and_feed(site, event)

    @precondition(is_in_office)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """Prove the leadership, if it is one; the answer may be read much later."""
        site = data.draw(st.sampled_from([site for site in self.sites if site.state.is_elected]))
        replica = site.state.replica_id
        if self.leader == (replica, site.state.term):
            self.session_until_s = self.now_s + SESSION_S
            site.news.append(Renewed(site.state.term, self.now_s + LEASE_S))
        else:
            site.news.append(Fenced(site.state.term, f"term {self.term} has begun"))

    @rule(replica=REPLICAS)
    def superlink_starts(self, replica: int) -> None:
        """Become warm."""
        site = self.sites[replica]
        if site.state.phase is not Phase.STOPPED:
            site.is_superlink_up = True
            self._tick_and_feed(site, SuperLinkReady())

    @rule(replica=REPLICAS)
    def superlink_dies(self, replica: int) -> None:
        """Kill it."""
        site = self.sites[replica]
        site.is_superlink_up, site.superlink_until_s = False, 0.0
        self._tick_and_feed(site, SuperLinkGone("it ended"))

    @rule(is_paused=st.booleans(), candidate=st.none() | REPLICAS)
    def operate(self, is_paused: bool, candidate: int | None) -> None:
        """Pause, resume, or ask for a switchover."""
        self.is_paused, self.candidate = is_paused, candidate
        if self.leader is not None:
            site = self.sites[self.leader[0]]
            site.news += [SwitchoverAsked(frozenset({"17"}), candidate), RunSettled("17")]

    @rule(replica=REPLICAS, chance=st.integers(0, 15))
    def stop(self, replica: int, chance: int) -> None:
        """Ask a replica to end, now and then."""
        if chance == 0:
            self._tick_and_feed(self.sites[replica], StopAsked("SIGTERM was received"))

    # --- what must always hold ---

    @invariant()
    def one_replica_serves(self) -> None:
        """At no moment do two SuperLinks have a lease, not even those of frozen replicas."""
        serving = [site for site in self.sites if site.is_superlink_up and self.now_s < site.superlink_until_s]
        assert len(serving) <= 1
        believing = [site for site in self.sites if site.state.is_elected and self.now_s < site.state.lease_until_s]
        assert len(believing) <= 1

    @invariant()
    def elected_replica_won_its_term(self) -> None:
        """Check that a term has one winner."""
        for site in self.sites:
            if site.state.is_elected:
                assert self.winners[site.state.term] == site.state.replica_id
            if site.state.phase is Phase.LEADING:
                assert site.state.term in site.took_over

    @invariant()
    def stand_down_ended_the_superlink(self) -> None:
        """Whoever is not elected has no lease to serve under."""
        for site in self.sites:
            assert site.state.is_elected or site.superlink_until_s == 0.0

    @invariant()
    def nobody_is_elected_after_a_tick_past_the_lease(self) -> None:
        """Let the loop come round, which it may at any time, on a copy."""
        for site in self.sites:
            after, _ = step(site.state, Tick(), now_s=max(self.now_s, site.state.lease_until_s), timing=TIMING)
            assert not after.is_elected

    @invariant()
    def stopped_replica_has_exited_once(self) -> None:
        """And one that is asked to stop does, at the latest with the answer to its campaign."""
        for site in self.sites:
            assert site.exits == int(site.state.phase is Phase.STOPPED)
            if site.state.is_stopping and site.state.phase is not Phase.STOPPED:
                assert site.is_campaigning
            state = site.state
            if state.phase is not Phase.STOPPED:
                state, actions = step(state, StopAsked("try"), now_s=self.now_s, timing=TIMING)
                if state.phase is Phase.CAMPAIGNING:
                    state, actions = step(state, NotElected("no"), now_s=self.now_s, timing=TIMING)
                assert state.phase is Phase.STOPPED
                assert isinstance(actions[-1], Exit)

    @invariant()
    def nobody_is_stuck(self) -> None:
        """With nobody leading and its SuperLink warm, each replica campaigns within three looks: try it on a copy."""
        for site in self.sites:
            if not site.state.is_stopping:
                assert _campaigns_soon(site.state, self.now_s, self.term), site.state


def _campaigns_soon(state: MachineState, now_s: float, term: int) -> bool:
    now_s = max(now_s, state.lease_until_s)
    state, _ = step(state, Tick(), now_s=now_s, timing=TIMING)
    if state.phase is Phase.CAMPAIGNING:
        state, _ = step(state, NotElected("lost"), now_s=now_s, timing=TIMING)
    state, _ = step(state, SuperLinkReady(), now_s=now_s, timing=TIMING)
    for _ in range(3):
        state, actions = step(state, Seen(leader=None, term=term), now_s=now_s, timing=TIMING)
        if any(isinstance(action, Campaign) for action in actions):
            return True
        now_s += max(TIMING.longest_rest_s, TIMING.defer_s)
    return False


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
